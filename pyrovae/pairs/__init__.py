"""What a pair is: two programs, their parameters, their traces and the contract that they keep."""
