package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"strconv"
	"time"
)

const validity = 365 * 24 * time.Hour

// makePKI writes the cluster's keys, certificates and kubeconfigs, once.
func (c *cluster) makePKI() error {
	if _, err := os.Stat(c.kubeconfig()); err == nil {
		return nil
	}
	if err := os.MkdirAll(c.pki(""), 0o755); err != nil {
		return err
	}
	ca, err := newAuthority()
	if err != nil {
		return err
	}
	if err := c.writeKey("ca", ca.key, ca.der); err != nil {
		return err
	}
	if err := c.writeServiceAccountKey(); err != nil {
		return err
	}
	type identity struct{ file, user, group string }
	client := []identity{
		{"controller-manager", "system:kube-controller-manager", ""},
		{"scheduler", "system:kube-scheduler", ""},
		{"proxy", "system:kube-proxy", ""},
		{"dns", "system:coredns", ""},
	}
	for n := 1; n <= maxNodes; n++ {
		client = append(client, identity{nodeName(n), "system:node:" + nodeName(n), "system:nodes"})
	}
	client = append(client, identity{"admin", "admin", "system:masters"}) // last: see above
	plain := []identity{
		{"apiserver", "kube-apiserver", ""},
		{"kubelet-client", "kube-apiserver-kubelet-client", "system:masters"},
		{"front-proxy", "front-proxy-client", ""},
	}
	for _, id := range plain {
		if err := c.issue(ca, id.file, id.user, id.group); err != nil {
			return err
		}
	}
	for _, id := range client {
		if err := c.issue(ca, id.file, id.user, id.group); err != nil {
			return err
		}
		if err := c.writeKubeconfig(id.file); err != nil {
			return err
		}
	}
	return nil
}

type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	der  []byte
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "csi-loop-e2e"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(validity),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err = x509.ParseCertificate(der)
	return &authority{key: key, cert: cert, der: der}, err
}

func (c *cluster) issue(ca *authority, file, user, group string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	cert := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: user},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(validity),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if group != "" {
		cert.Subject.Organization = []string{group}
	}
	if file == "apiserver" {
		cert.IPAddresses = []net.IP{net.ParseIP(apiService), net.ParseIP(nodeAddress(1)), net.ParseIP("127.0.0.1")}
		cert.DNSNames = []string{
			"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
			"kubernetes.default.svc.cluster.local",
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, ca.cert, key.Public(), ca.key)
	if err != nil {
		return err
	}
	return c.writeKey(file, key, der)
}

func (c *cluster) writeKey(file string, key *ecdsa.PrivateKey, cert []byte) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		writePEM(c.pki(file+".key"), "PRIVATE KEY", der, 0o600),
		writePEM(c.pki(file+".crt"), "CERTIFICATE", cert, 0o644),
	)
}

func (c *cluster) writeServiceAccountKey() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return errors.Join(
		writePEM(c.pki("service-account.key"), "EC PRIVATE KEY", private, 0o600),
		writePEM(c.pki("service-account.pub"), "PUBLIC KEY", der, 0o644),
	)
}

func writePEM(path, kind string, der []byte, mode fs.FileMode) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
}

// writeKubeconfig makes a file that stands alone, so that it can be copied.
func (c *cluster) writeKubeconfig(file string) error {
	var data [3]string
	for i, name := range []string{"ca.crt", file + ".crt", file + ".key"} {
		content, err := os.ReadFile(c.pki(name))
		if err != nil {
			return err
		}
		data[i] = base64.StdEncoding.EncodeToString(content)
	}
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: csi-loop-e2e, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: %s, user: {client-certificate-data: %s, client-key-data: %s}}]
contexts: [{name: csi-loop-e2e, context: {cluster: csi-loop-e2e, user: %[3]s}}]
current-context: csi-loop-e2e
`, apiServer(), data[0], file, data[1], data[2])
	// In one step: the administrator's is the mark of completeness.
	path := c.pki(file + ".kubeconfig")
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		return err
	}
	// Whoever asked sudo for a cluster also wants to use it, by ssh too.
	if uid, err := strconv.Atoi(os.Getenv("SUDO_UID")); err == nil && file == "admin" {
		if err := errors.Join(os.Chown(path+".new", uid, -1), os.Chown(c.pki(file+".key"), uid, -1)); err != nil {
			return err
		}
	}
	return os.Rename(path+".new", path)
}
