// Package kube gives package router what it needs of Kubernetes: whose a token is
// (TokenReview), which nodes there are (CSINode), where the other replicas are
// (Lease), and the certificate of the links (Secret and ConfigMap).
//
// The rights it needs are few: create tokenreviews; get, list and watch csinodes;
// and, in its own namespace, get, list, create, update and delete leases, get,
// create and update secrets and configmaps.
package kube
