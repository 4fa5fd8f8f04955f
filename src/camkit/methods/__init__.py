"""The methods: each a class whose :meth:`map` is its paper's formula and nothing else."""
