"""Nodes for others to use: exports and the NBD server that offers them."""
