"""What convtap uses of torch beyond its documentation, one mechanism a module."""
