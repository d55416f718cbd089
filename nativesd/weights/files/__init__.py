"""Sources to headers and tensors: files, folders, the hub; which weights are where."""
