"""The networks, as nn.Modules: no files, no names of any checkpoint, no device decisions."""
