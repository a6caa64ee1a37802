"""What `jaxsparse bench` measures: layers of one's own sizes, ours beside dense and whatever else is installed."""
