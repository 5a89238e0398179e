// Makes an organization and a key over gRPC, streams a chat with it, and shows how an error is told.
//
// AIAAS_API_KEY is a platform administrator's key, AIAAS_IDENTITY and AIAAS_ROUTER are host:port of the two services,
// and AIAAS_TLS_CERTIFICATE_PATH, AIAAS_TLS_KEY_PATH and AIAAS_TLS_CA_PATH the files of a certificate for tool.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	identityv1 "example.com/aiaas/identity/v1"
	routerv1 "example.com/aiaas/router/v1"
	typev1 "example.com/aiaas/type/v1"
)

// apiKey goes with every call, and over TLS only.
type apiKey string

func (key apiKey) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(key)}, nil
}

func (key apiKey) RequireTransportSecurity() bool { return true }

// connect opens a connection to one service of the platform, whose certificate has to say that it is that one.
func connect(service, target, key string) (*grpc.ClientConn, error) {
	own, err := tls.LoadX509KeyPair(os.Getenv("AIAAS_TLS_CERTIFICATE_PATH"), os.Getenv("AIAAS_TLS_KEY_PATH"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(os.Getenv("AIAAS_TLS_CA_PATH"))
	if err != nil {
		return nil, err
	}
	trusted := x509.NewCertPool()
	if !trusted.AppendCertsFromPEM(ca) {
		return nil, errors.New("AIAAS_TLS_CA_PATH holds no certificate")
	}
	secure := credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{own},
		RootCAs:      trusted,
		ServerName:   service + ".aiaas.internal",
		MinVersion:   tls.VersionTLS12,
	})
	return grpc.Dial(target, grpc.WithTransportCredentials(secure), grpc.WithPerRPCCredentials(apiKey(key)))
}

// makeKey returns the id of a new organization, and the secret of a key on it, which is told this once.
func makeKey(ctx context.Context) (organizationID, secret string, err error) {
	identity, err := connect("identity", os.Getenv("AIAAS_IDENTITY"), os.Getenv("AIAAS_API_KEY"))
	if err != nil {
		return "", "", err
	}
	defer identity.Close()
	made, err := identityv1.NewOrganizationServiceClient(identity).CreateOrganization(
		ctx,
		&identityv1.CreateOrganizationRequest{
			Organization: &identityv1.Organization{DisplayName: "Example in Go"},
		},
	)
	if err != nil {
		return "", "", err
	}
	organizationID = made.GetOrganization().GetOrganizationId()
	key, err := identityv1.NewApiKeyServiceClient(identity).CreateApiKey(
		ctx,
		&identityv1.CreateApiKeyRequest{
			OrganizationId: organizationID,
			ApiKey:         &identityv1.ApiKey{DisplayName: "example"},
		},
	)
	return organizationID, key.GetSecret(), err
}

// chat streams one answer: a head, server-sent events as OpenAI writes them, and a tail with what was used.
func chat(ctx context.Context, inference routerv1.InferenceServiceClient, model string) error {
	body, err := json.Marshal(map[string]any{
		"model":      model,
		"messages":   []map[string]string{{"role": "user", "content": "Say hello."}},
		"max_tokens": 8,
		"stream":     true,
	})
	if err != nil {
		return err
	}
	answer, err := inference.Infer(ctx, &routerv1.InferRequest{
		Endpoint: typev1.Endpoint_ENDPOINT_CHAT_COMPLETIONS,
		Body:     body,
	})
	if err != nil {
		return err
	}
	for {
		part, err := answer.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		for _, line := range bytes.Split(part.GetData(), []byte("\n")) {
			if !bytes.HasPrefix(line, []byte("data: {")) {
				continue
			}
			var chunk struct {
				Choices []struct{ Delta struct{ Content string } }
			}
			if err := json.Unmarshal(bytes.TrimPrefix(line, []byte("data: ")), &chunk); err != nil {
				return err
			}
			for _, choice := range chunk.Choices {
				fmt.Print(choice.Delta.Content)
			}
		}
		if tail := part.GetTail(); tail != nil {
			fmt.Printf("\ntokens: %d\n", tail.GetUsage().GetCompletionTokens())
		}
	}
}

func run(ctx context.Context) error {
	organizationID, secret, err := makeKey(ctx)
	if err != nil {
		return err
	}
	fmt.Println("organization:", organizationID)
	router, err := connect("router", os.Getenv("AIAAS_ROUTER"), secret)
	if err != nil {
		return err
	}
	defer router.Close()
	inference := routerv1.NewInferenceServiceClient(router)
	served, err := inference.ListServedModels(ctx, &routerv1.ListServedModelsRequest{})
	if err != nil {
		return err
	}
	names := []string{}
	for _, model := range served.GetModels() {
		names = append(names, model.GetModel())
	}
	fmt.Println("models:", strings.Join(names, ", "))
	if err := chat(ctx, inference, "smollm2"); err != nil {
		return err
	}
	refused := status.Convert(chat(ctx, inference, "no-such-model"))
	fmt.Printf("refused: %s: %s\n", refused.Code(), refused.Message())
	return nil
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := run(ctx); err != nil {
		log.Fatal(err)
	}
}
