"""From a request to an open pipeline: how it runs, the engines that serve it, and the memory that they take."""
