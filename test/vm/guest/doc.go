// Package guest has the tests of the virtual machine itself: that the guest is
// as the other tests expect it. They run in the guest only.
package guest
