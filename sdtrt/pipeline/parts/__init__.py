"""What diffusers sees in place of a pipeline's parts where engines run them, and what watches over the parts."""
