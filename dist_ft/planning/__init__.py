"""What a run will need, before it is started: memory, arithmetic, traffic and time, by phase.

``shape``, ``hardware``, ``memory``, ``cost`` and ``settings`` are arithmetic without torch;
``meta`` reads a model's shape from its configuration on torch's meta device, without any weights.
"""
