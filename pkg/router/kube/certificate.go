package kube

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
)

const (
	// caLife is how long a CA lasts; with caRenew left the next one is made.
	caLife  = 365 * 24 * time.Hour
	caRenew = 90 * 24 * time.Hour
	// spread is how long a new CA is only published: every node has read the
	// ConfigMap by then, before a certificate of the new CA is shown.
	spread = 24 * time.Hour
	// leafLife is how long the certificate of the links lasts; with leafRenew left
	// the next one is made.
	leafLife  = 30 * 24 * time.Hour
	leafRenew = 10 * 24 * time.Hour
	// backdate is for clocks that are behind.
	backdate = time.Hour
	// certificateEvery is how often the Secret is looked at.
	certificateEvery = time.Minute

	// Keys of the Secret. Those of the CA that is on its way have caNext before them.
	caKeyKey = "ca.key"
	caNext   = "next-"
	// CAKey is the key of the bundle in the ConfigMap, and of the CA in the Secret.
	CAKey = "ca.crt"
)

// Certificates makes and renews the certificate of the links: CA and certificate are
// in a Secret that all replicas share, the CAs that nodes must accept in a ConfigMap.
// Replicas that write at once find out by the objects' versions; the loser reads what
// the winner wrote.
type Certificates struct {
	Client            kubeapi.Interface
	Namespace         string
	Secret, ConfigMap string
	// ServerName is what the certificate is for.
	ServerName string
	// Now is the clock; nil is time.Now.
	Now func() time.Time

	mu      sync.Mutex
	current *tls.Certificate // guarded by mu
}

// Get returns the certificate.
func (c *Certificates) Get() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == nil {
		return nil, errors.New("there is no certificate yet")
	}
	return c.current, nil
}

// Run keeps everything up to date until ctx ends.
func (c *Certificates) Run(ctx context.Context) {
	for {
		pause := certificateEvery
		if err := c.Ensure(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Cannot bring the certificate up to date; trying again", "secret", c.Secret, "configMap", c.ConfigMap)
			pause = 5 * time.Second
		}
		if sleep(ctx, pause) != nil {
			return
		}
	}
}

// attempts bounds how often a lost race is run again.
const attempts = 10

// Ensure makes what is missing, renews what is about to expire, and loads it.
func (c *Certificates) Ensure(ctx context.Context) error {
	if c.Now == nil {
		c.Now = time.Now
	}
	var err error
	for range attempts {
		if err = c.ensure(ctx); !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	return err
}

func (c *Certificates) ensure(ctx context.Context) error {
	secrets := c.Client.Secrets(c.Namespace)
	secret, err := secrets.Get(ctx, c.Secret, meta.GetOptions{})
	missing := apierrors.IsNotFound(err)
	switch {
	case missing:
		secret = &core.Secret{ObjectMeta: meta.ObjectMeta{Name: c.Secret}, Type: core.SecretTypeTLS}
	case err != nil:
		return err
	}
	data, changed, err := c.renew(secret.Data)
	if err != nil {
		return err
	}
	// Nodes must know a CA before anything signed by it is shown: the ConfigMap
	// first. If this replica loses the race for the Secret, the next attempt
	// corrects the ConfigMap.
	if changed && !missing {
		if err := c.publish(ctx, data); err != nil {
			return err
		}
	}
	secret.Data = data
	switch {
	case missing:
		_, err = secrets.Create(ctx, secret, meta.CreateOptions{})
	case changed:
		_, err = secrets.Update(ctx, secret, meta.UpdateOptions{})
	}
	if err != nil {
		return err
	}
	if err := c.publish(ctx, data); err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(data[core.TLSCertKey], data[core.TLSPrivateKeyKey])
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.current = &pair
	return nil
}

// publish writes the CAs that nodes must accept.
func (c *Certificates) publish(ctx context.Context, data map[string][]byte) error {
	bundle := string(data[CAKey]) + string(data[caNext+CAKey])
	configMaps := c.Client.ConfigMaps(c.Namespace)
	cm, err := configMaps.Get(ctx, c.ConfigMap, meta.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = configMaps.Create(ctx, &core.ConfigMap{ObjectMeta: meta.ObjectMeta{Name: c.ConfigMap}, Data: map[string]string{CAKey: bundle}}, meta.CreateOptions{})
	case err == nil && cm.Data[CAKey] != bundle:
		cm.Data = map[string]string{CAKey: bundle}
		_, err = configMaps.Update(ctx, cm, meta.UpdateOptions{})
	}
	return err
}

// renew says what the Secret should hold. A CA is followed by one that is only
// published for a while; then that one signs, and the old one is still published
// until the next change, so that nodes accept both.
func (c *Certificates) renew(old map[string][]byte) (data map[string][]byte, changed bool, err error) {
	data = maps.Clone(old)
	if data == nil {
		data = map[string][]byte{}
	}
	now := c.Now()
	ca, err := parsePair(data[CAKey], data[caKeyKey])
	if err != nil || !now.Before(ca.cert.NotAfter) {
		// Nothing there, or nothing of use: begin anew.
		ca, err = newCA(now)
		if err != nil {
			return nil, false, err
		}
		data = map[string][]byte{CAKey: ca.certPEM, caKeyKey: ca.keyPEM}
		changed = true
	}
	next, nextErr := parsePair(data[caNext+CAKey], data[caNext+caKeyKey])
	switch {
	case nextErr != nil && ca.cert.NotAfter.Sub(now) < caRenew:
		next, err = newCA(now)
		if err != nil {
			return nil, false, err
		}
		data[caNext+CAKey], data[caNext+caKeyKey] = next.certPEM, next.keyPEM
		changed = true
	case nextErr == nil && next.cert.NotAfter.After(ca.cert.NotAfter) && now.Sub(next.cert.NotBefore) > spread+backdate:
		// Every node knows it: it signs from now on, and the old one stays known.
		data[CAKey], data[caNext+CAKey] = next.certPEM, ca.certPEM
		data[caKeyKey], data[caNext+caKeyKey] = next.keyPEM, ca.keyPEM
		ca, changed = next, true
	case nextErr == nil && !next.cert.NotAfter.After(now):
		delete(data, caNext+CAKey)
		delete(data, caNext+caKeyKey)
		changed = true
	}
	leaf, err := parsePair(data[core.TLSCertKey], data[core.TLSPrivateKeyKey])
	if err != nil || leaf.cert.NotAfter.Sub(now) < leafRenew || leaf.cert.VerifyHostname(c.ServerName) != nil || leaf.cert.CheckSignatureFrom(ca.cert) != nil {
		leaf, err = ca.issue(c.ServerName, now)
		if err != nil {
			return nil, false, err
		}
		data[core.TLSCertKey], data[core.TLSPrivateKeyKey] = leaf.certPEM, leaf.keyPEM
		changed = true
	}
	return data, changed, nil
}

// pair is a certificate with its key.
type pair struct {
	cert            *x509.Certificate
	key             *ecdsa.PrivateKey
	certPEM, keyPEM []byte
}

func parsePair(certPEM, keyPEM []byte) (pair, error) {
	p := pair{certPEM: certPEM, keyPEM: keyPEM}
	certBlock, _ := pem.Decode(certPEM)
	keyBlock, _ := pem.Decode(keyPEM)
	if certBlock == nil || keyBlock == nil {
		return p, errors.New("not PEM")
	}
	var err error
	if p.cert, err = x509.ParseCertificate(certBlock.Bytes); err != nil {
		return p, err
	}
	if p.key, err = x509.ParseECPrivateKey(keyBlock.Bytes); err != nil {
		return p, err
	}
	if !p.key.PublicKey.Equal(p.cert.PublicKey) {
		return p, errors.New("the key is not the certificate's")
	}
	return p, nil
}

// newCA makes a CA that can sign certificates for the links and nothing below.
func newCA(now time.Time) (pair, error) {
	return sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "csi-loop link CA " + now.UTC().Format(time.DateOnly)}, NotAfter: now.Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, now)
}

func (p pair) issue(name string, now time.Time) (pair, error) {
	end := now.Add(leafLife)
	if end.After(p.cert.NotAfter) {
		end = p.cert.NotAfter
	}
	return sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, &p, now)
}

// sign makes a key and its certificate, by parent or by itself.
func sign(template *x509.Certificate, parent *pair, now time.Time) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return pair{}, err
	}
	template.NotBefore = now.Add(-backdate)
	signer, signerKey := template, key
	if parent != nil {
		signer, signerKey = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, &key.PublicKey, signerKey)
	if err != nil {
		return pair{}, err
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return pair{}, err
	}
	return parsePair(
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}))
}

// Dir returns the certificate that somebody else keeps in a directory, as tls.crt
// and tls.key. It is read again when it changes.
func Dir(dir string) func() (*tls.Certificate, error) {
	var mu sync.Mutex
	var current *tls.Certificate
	var seenCert, seenKey []byte
	return func() (*tls.Certificate, error) {
		cert, certErr := os.ReadFile(filepath.Join(dir, core.TLSCertKey))
		key, keyErr := os.ReadFile(filepath.Join(dir, core.TLSPrivateKeyKey))
		mu.Lock()
		defer mu.Unlock()
		err := errors.Join(certErr, keyErr)
		if err == nil && current != nil && bytes.Equal(cert, seenCert) && bytes.Equal(key, seenKey) {
			return current, nil
		}
		var p tls.Certificate
		if err == nil {
			p, err = tls.X509KeyPair(cert, key)
		}
		switch {
		case err == nil:
			current, seenCert, seenKey = &p, cert, key
		case current == nil:
			return nil, fmt.Errorf("certificate in %s: %w", dir, err)
		}
		return current, nil // half-written files are read again the next time
	}
}
