"""From a request to images: diffusers' pipelines with engines in them."""
