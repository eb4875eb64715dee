// Package image proves that the container image is complete: every program that
// the driver can call is inside and works, with nothing else around it.
//
// "make test-image" builds the image and runs the tests.
package image
