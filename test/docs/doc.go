// Package docs holds the pages against the tests: each block of commands is run by a
// test that it names, or says why none runs it.
//
// A comment above a block, or above several of one section, says which:
//
//	<!-- run by TestName in path/of/the_test.go, TestOther in path/of/the_test.go -->
//	<!-- not run: why -->
//	<!-- no commands: what it is -->
//
// A test that is said to run a block takes it from the page, by Take or as test/e2e does
// with the command blocks, and fails if it has left one out. The tutorials need no
// comment: test/e2e runs every command of them. Nor do lines that call make: that the
// target exists is checked.
package docs
