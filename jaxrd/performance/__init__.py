"""What a train step costs: where its time goes, its operations against what devices can do, its memory, its trace.

Nothing here prints, and nothing that trains needs it; `launch.benchmark` is the command over it.
"""
