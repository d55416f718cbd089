"""The folder of graphs and engines: found by what they are for, checked, built once, and pruned."""
