"""The layers, one idea per file. None knows a mesh axis, a compute dtype or a file format."""
