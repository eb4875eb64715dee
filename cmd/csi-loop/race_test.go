//go:build race

package main

// raceDetector says that this is a build with the race detector, which multiplies
// the memory a program takes.
const raceDetector = true
