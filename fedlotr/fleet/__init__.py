"""Who there is and how fast they are, in virtual seconds."""
