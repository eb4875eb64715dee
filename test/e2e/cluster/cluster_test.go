package main

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
)

func TestKeysAreMadeOnce(t *testing.T) {
	c := &cluster{state: t.TempDir(), size: 3}
	if err := c.makePKI(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(c.kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.makePKI(); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(c.kubeconfig())
	if err != nil || string(after) != string(before) {
		t.Errorf("a second up changes the administrator's kubeconfig (%v)", err)
	}
}

func TestCertificatesAreTheAuthoritys(t *testing.T) {
	c := &cluster{state: t.TempDir(), size: 3}
	if err := c.makePKI(); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(c.pki("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	for _, name := range []string{"apiserver", "admin", "node1", "node9", "front-proxy"} {
		pair, err := tls.LoadX509KeyPair(c.pki(name+".crt"), c.pki(name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if name == "apiserver" {
			for _, host := range []string{apiService, nodeAddress(1), "kubernetes.default.svc"} {
				if err := pair.Leaf.VerifyHostname(host); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

func TestDownRemovesNothingThatUpDidNotMake(t *testing.T) {
	c := &cluster{state: t.TempDir(), size: 3}
	precious := filepath.Join(c.state, "precious")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
}

func TestFlagsOfUpAreRemembered(t *testing.T) {
	c := &cluster{state: t.TempDir(), bin: "/b", images: "/i", size: 2, pool: "xfs", proxy: "iptables"}
	if err := c.remember(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(c.state, flagFile)); err != nil {
		t.Error(err)
	}
	if err := (&cluster{state: t.TempDir()}).recall(); err != nil {
		t.Errorf("without a cluster: %v", err)
	}
}
