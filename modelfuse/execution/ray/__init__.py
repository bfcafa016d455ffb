"""Run a merge on a Ray cluster: the same procedures, spans and bytes as on one machine.

The driver (:mod:`~modelfuse.execution.ray.driver`) keeps the plan, the procedures, the journal and the progress, and
submits batches of spans as Ray tasks; a node reads the inputs, processes them and writes the output's files at the
planned offsets (:mod:`~modelfuse.execution.ray.node`).
"""
