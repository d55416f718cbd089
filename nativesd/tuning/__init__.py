"""The same modules by faster operators: which, a probe of this machine decides."""
