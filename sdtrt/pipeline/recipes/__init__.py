"""How a picture was made: what its file says, or a web UI's text, as the options of a request."""
