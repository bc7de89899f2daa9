"""Deployment of a student: what it costs, what it loses, and whether it can replace its teacher."""
