"""What a request gives: prompts and pictures, read and checked before there is a pipeline."""
