"""``kd generate``: a teacher's texts to a set of prompts, from a local network or a server, once each."""
