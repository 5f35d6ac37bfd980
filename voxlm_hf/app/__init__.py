"""The command line and the file formats; not part of the remote code."""
