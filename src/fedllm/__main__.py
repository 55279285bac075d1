"""`python -m fedllm`."""

from fedllm.cli import main

if __name__ == "__main__":
    main()
