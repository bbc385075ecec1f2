"""What a recipe needs before it is run: memory, time and cost on so many GPUs, by arithmetic. torch is not needed."""
