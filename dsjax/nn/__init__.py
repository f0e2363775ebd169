"""The layers, one idea per file. None knows a compute dtype or a file format."""
