"""The layers, one idea per file. None of them knows a mesh axis, a compute dtype or a file format."""
