"""The decision as one page that opens offline: ``kd decide … page=FILE.html``. No torch."""
