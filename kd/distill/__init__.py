"""The LightningModule and what it is made of. As a function, ``kd.distill(…)`` is :func:`kd.run.distill.distill`."""
