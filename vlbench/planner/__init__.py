"""What a training needs before a GPU is paid for: memory, operations, time, money."""
