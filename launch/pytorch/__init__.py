"""The PyTorch side of `launch.benchmark --compare=torch`: the same train step as plain eager code, in a process of its own.

    jobs        what is to be timed, and what there is to time; imports neither torch nor jax
    networks    the architectures, with the weights' names of the public classes
    steps       one train step of each method
    worker      the child process, which runs steps when told to
    comparison  the parent's side: starts the child, has both sides step in turn, compares

Our own code, written from the papers and from counts of what published code forwards; nothing here is needed for training.
"""
