"""What differs between one process, DDP, FSDP2 and ZeRO, so that the loop need not know."""
