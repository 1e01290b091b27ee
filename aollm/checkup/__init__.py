"""The checkup of a machine: one thing found out at a time, with what to do about it. It prints nothing and changes nothing."""
