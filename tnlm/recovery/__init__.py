"""How the loss is won back: what a fit knows of earlier fits, and what is trained afterwards."""
