"""A page on a model, to look at: made of its bundle, and of the workspace where there is one."""
