"""What stays at home: the command line and the file formats. Nothing here travels with a checkpoint."""
