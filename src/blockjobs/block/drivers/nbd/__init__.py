"""The `nbd` driver: an export of an NBD server as a node."""
