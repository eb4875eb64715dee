package loop

const childVariable = "X"

func child() int { return 0 }
