"""A merge on the nodes of a Ray cluster: the same procedures, spans and bytes as on one machine.

This machine keeps the plan, the procedures, the journal and the progress, and gives out batches of spans as tasks
(:mod:`~modelfuse.execution.ray.driver`); a node reads the inputs, works, and writes into the output's files at their
planned places (:mod:`~modelfuse.execution.ray.node`).
"""
