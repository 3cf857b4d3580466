"""How families of models write thoughts and calls of tools: one file a family, `table` says which is whose."""
