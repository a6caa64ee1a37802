"""What a layer costs: how much it stores, how long it takes, and whether it is faster than the dense one."""
