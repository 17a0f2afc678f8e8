"""What dev.py needs to set up its environments and to check a release; users of ComfyUI never run it."""
