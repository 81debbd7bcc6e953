"""What a GPU says about this package in five minutes: its tests, its kernels' times, whole models. See __main__.py."""
