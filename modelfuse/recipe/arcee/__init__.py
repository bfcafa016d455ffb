"""The configurations of arcee's mergekit, read as they are: for any tensor, its method, models and parameters."""
