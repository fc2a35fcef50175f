"""Sandbox: runs the code that a model writes, without network, without this machine's files, within bounds."""
