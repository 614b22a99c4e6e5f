"""What must hold on a GPU. The whole folder is for one GPU and takes minutes.

A machine with a GPU may have torch and little else. A file that needs more says so with
``pytest.importorskip(NAME, reason=...)`` before the imports that need it, pydantic for everything
that reads a configuration; tests/unit/test_gpu_tests_skip.py holds files to it.
"""
