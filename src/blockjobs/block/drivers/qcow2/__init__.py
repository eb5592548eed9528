"""The qcow2 image format."""
