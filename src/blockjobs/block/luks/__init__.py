"""LUKS version 1, for the `luks` driver and for qcow2 images that are enciphered."""
